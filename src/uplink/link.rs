//! MQTT packets over any byte stream.
