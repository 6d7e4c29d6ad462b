"""A dataset into blocks of tokens: where its rows come from, what text is in them, how it is tokenized."""
