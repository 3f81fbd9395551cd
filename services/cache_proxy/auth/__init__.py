"""Who is let in, and by which ways: certificates and tokens, towards callers and towards the model."""
