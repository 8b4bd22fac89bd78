"""Launch scripts, as package data: installed as `rung.launch_templates`."""
