"""From raw text to webdataset shards: sources, filters, documents, conversations, tokenizers."""
