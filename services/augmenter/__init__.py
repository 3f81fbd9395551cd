"""The augmenter: reads files of job postings and writes them back with a seniority level on each line."""
