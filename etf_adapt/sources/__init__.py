"""Data sets as people have them: tables, folders of images, the Hub.

Read ``opening`` first: a name or path becomes raw splits. ``folders`` lists what lies below a folder, ``tables`` reads csv and
json as they stand, ``image_names`` finds the images that a table names. ``columns`` finds the input and the label, and
``image_checks`` reads the headers of images.
"""
