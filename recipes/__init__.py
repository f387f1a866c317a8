"""How the models inside the package are made."""
