"""The main job through its command line."""
