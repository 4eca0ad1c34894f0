"""Typed configuration: the schema of ``conf/``, its validation, and the command line of every script."""
