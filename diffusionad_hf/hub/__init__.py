"""Models and Spaces on the Hugging Face Hub."""
