"""Thin adapters for model runners; each imports the library that it is for, and nothing else imports them."""
