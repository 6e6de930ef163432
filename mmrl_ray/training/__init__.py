"""From a config to a finished run folder, and to a server."""
