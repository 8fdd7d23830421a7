"""What is measured on features: store, moments, Frechet, KID, PRDC, nearest pictures, intervals."""
