"""What operating a run needs: the screen, metrics, the summary and its text, curves, logging, run folders, checks.

Import from the modules: this one stays empty, so that the light ones load without the heavy ones (matplotlib, rich).
"""
