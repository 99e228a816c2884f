"""A finished folder to the Hub, in one commit: ``etf-adapt publish FOLDER user/name``.

``publish`` is the whole way; ``check`` says whether the folder is complete, loadable and free of tokens and local paths;
``send`` uploads it, and says how to carry on where that fails.
"""
