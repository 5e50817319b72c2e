"""Tasks. One file a task: how an example is decoded and checked, its metrics, what its teacher's signals say."""
