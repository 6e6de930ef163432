"""The vision-language policy: load, adapter, shared prefix, vision cache, decode, collate."""
