"""The main job on packaged parts: train two prefixes, write with them, score what they wrote."""
