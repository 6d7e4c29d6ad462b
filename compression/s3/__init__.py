"""Models and text in S3, or in storage that speaks its protocol."""
