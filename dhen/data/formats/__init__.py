"""Readers for raw files. They yield blocks of rows as typed columns."""
