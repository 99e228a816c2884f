"""A classifier without training: predictions, and its head set anew in closed form.

Read ``classifier`` (any model on new inputs; scores of a split) over ``predictions`` (each row once, over all processes;
calibration), and ``rows`` (a data set as a model reads it). ``refit`` sets the head of any checkpoint from one pass, judged by
``held_out`` rows; ``extend`` adds rows and classes by ``head_statistics`` alone; both leave a ``finished_model``. ``launch``:
threads and processes.
"""
