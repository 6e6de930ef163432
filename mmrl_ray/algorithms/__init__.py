"""How a policy learns: one file a family of algorithms, and the registry that finds them."""
