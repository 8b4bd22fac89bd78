"""What is trained: each recipe composes the floors below."""
