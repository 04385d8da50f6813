"""The whole job as one folder of restartable stages."""
