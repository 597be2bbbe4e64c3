"""How the model is spread over ranks (paper section 3)."""
