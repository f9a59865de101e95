"""The web demo; `app.main` starts it."""
