"""Where the files to augment come from: a listing, --watch, or a queue of S3 events."""
