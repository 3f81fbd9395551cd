"""A stand-in for the seniority model, for demos and tests only."""
