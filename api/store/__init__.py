"""Where finished files are kept: a local folder, or a bucket in S3."""
