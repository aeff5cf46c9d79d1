"""The input: parquet shards and their versions, the columns a job needs, rows as a Ray Data source."""
