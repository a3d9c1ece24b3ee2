"""What the verbs do, in terms of the floors below."""
