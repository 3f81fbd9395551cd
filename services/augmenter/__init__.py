"""The client that adds a seniority level to job postings: files in, the same files with levels out."""
