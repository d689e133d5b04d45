"""How plugins and adapters are found."""
