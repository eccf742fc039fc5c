"""Asking about documents that are read as latents: answers, chats, and the documents they are given."""
