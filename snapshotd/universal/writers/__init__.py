"""
Writers: one file per format, each with ``write(state, path, options)``; see convert.py for the engine they share.
"""
