"""Other people's libraries, measured beside ours: each in a virtual environment of its own, driven by a script that its Python runs."""
