"""The two model families: how their parts are loaded, and how the mini one is built."""
