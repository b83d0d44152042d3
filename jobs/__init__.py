"""The cluster: Ray submission, the job that trains, grids, MLflow, comparison, and the demo.

Lives here: everything that knows of Ray or MLflow. A job wraps ``pipeline.train`` and never enters
it. May import: ``pipeline`` and below, ``ray``, ``mlflow``. ``data_prep`` is used through its
command line only.
"""
