"""Captioner families behind one interface."""
