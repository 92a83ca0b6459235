"""The speed table: shapes, their data, how calls are timed, and the read limit of the same run."""
