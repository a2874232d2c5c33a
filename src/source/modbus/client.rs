//! One Modbus line: sends the planned reads, checks the replies, opens the line again when it broke.
