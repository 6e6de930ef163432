"""Pictures and captions: the hardened decoder, samples, importers, the scenes generator."""
