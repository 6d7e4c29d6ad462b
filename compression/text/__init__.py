"""A dataset into token blocks: documents out of files or rows, tokens out of documents."""
