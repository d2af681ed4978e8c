"""
Universal checkpoints: any framework's checkpoint in, any layout out, streamed, verified, with no pickle left.

Reading into universal imports neither torch nor a framework.
"""
