"""What long runs share: configuration, processes, records and resumption, identity, report pages, pipelines."""
