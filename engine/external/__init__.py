"""One thin file per optional library; nothing else in the engine imports these libraries."""
