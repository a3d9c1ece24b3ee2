"""How each option of a captured machine moves to a new place."""
