"""The tests, in folders that mirror the library's rooms; `support` holds what several folders
share."""
