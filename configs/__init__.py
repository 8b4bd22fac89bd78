"""The Hydra groups, shipped as package data: installed as `rung.configs`."""
