"""Where the files to augment come from: a listing, a watched folder, or an SQS queue."""
