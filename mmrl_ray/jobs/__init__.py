"""Jobs on a cluster, and what one does to a run from outside while it goes on."""
