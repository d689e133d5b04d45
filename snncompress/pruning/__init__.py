"""apply(), and what it does step by step."""
