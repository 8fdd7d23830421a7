"""Our metrics in the shape that other libraries' users expect."""
