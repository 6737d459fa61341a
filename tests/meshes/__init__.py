"""Batches and parameters divided over devices and processes."""
